#!/bin/sh
# fedveil-serve FEDERATION.toml RUN: begin the run in the folder RUN, or go on with it after a stop or a crash.
# Whatever supervises the server calls this again and again; a run that has ended stays ended.
set -eu

settings=${1:?federation.toml}
run=${2:?the run folder}
journal=$run/journal.jsonl

if [ ! -e "$journal" ]; then
    exec fedveil server start "$settings" --run "$run"
fi
# Journals are canonical JSON: in a text field these quotes would stand behind backslashes.
if grep -q '"kind":"run.end"' "$journal"; then
    echo "the run in $run has ended"
    exit 0
fi
exec fedveil server resume "$settings" "$run"
