"""Which queries of a site's owner are run: one SELECT, by the rules of quoting of its database."""

import contextlib

import pytest

from fedveil.client.records.read import statements
from fedveil.common.errors import UsageError

CHANGING = ("drop table t", "DELETE FROM t", "UPDATE t SET age = 0", "INSERT INTO t SELECT * FROM t",
            "CREATE TABLE other AS SELECT * FROM t", "WITH x AS (SELECT 1) DELETE FROM t")  # fmt: skip


@pytest.mark.parametrize(
    "query",
    [
        "SELECT a FROM t",
        " \n-- drop\n/* ; */ select 1;",
        "WITH x AS (SELECT 1) SELECT * FROM x",
        "(SELECT 1) UNION (SELECT 2)",
        "SELECT 'it''s; drop table t', \"update\" FROM t",
        "SELECT 1 -- it's ;drop\r\n FROM t;\n-- end",
        'SELECT t.call, m.merge, "t" . "x", "t".create, a AS copy FROM t',
        "SELECT truncate(x, 2), INSERT (a, 1, 2, 'x'), REPLACE(a, 'x', 'y') FROM t",
        "SELECT freq 'x', a $1 FROM t",
        "VALUES (1)",
        "SELECT updated, created, inserted_at, replace(a, 'x', 'y') FROM t WHERE m = 'update'",
    ],
)
def test_queries_that_read(query):
    statements.require_select(query)


@pytest.mark.parametrize(
    ("database", "query"),
    [
        ("sqlite", 'SELECT "update", [delete], [a]]b], `into` FROM t'),
        ("mysql", "SELECT `update` FROM t"),
        ("postgresql", "SELECT $$;drop$$, $a$;'$a$"),
        ("postgresql", "SELECT ARRAY['a]'], b[1], c #>> '{d}' FROM t ORDER BY 'x'"),
        ("postgresql", "SELECT open, close, use FROM prices"),
        ("duckdb", "FROM t SELECT ['a]']"),
    ],
)
def test_queries_that_read_by_the_rules_of_their_database(database, query):
    statements.require_select(query, database)
    with pytest.raises(UsageError):
        statements.require_select(query)


KINDS = ("", "sqlite", "postgresql", "mysql", "mariadb", "oracle", "mssql", "duckdb")


@pytest.mark.parametrize("database", KINDS)
@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 /* /* */ ' */ ; DROP TABLE t; -- '",
        "SELECT E'\\'' ; DROP TABLE t -- '",
        "SELECT '\\', 1 FROM t INTO OUTFILE '/x' -- '",
        "SELECT name, 1--1 FROM t INTO OUTFILE '/x'",
        "SELECT name, 1--\u00a01 FROM t INTO OUTFILE '/x'",
        "SELECT 1 -- \r'\n; DROP TABLE t; -- '",
        "SELECT 1 /*M! INTO OUTFILE '/x' */",
        "SELECT 1 /*!50000 INTO OUTFILE '/x' */",
        "SELECT q'[']' ; DROP TABLE t; -- '",
        "SELECT $\u20ac$'$\u20ac$; DROP TABLE t; -- '",
        "SELECT x\u20ac$$'$$' ; DROP TABLE t; --'",
        "SELECT 1.DELETE FROM t",
        "SELECT 1e.DELETE FROM t",
        'SELECT "a"DELETE FROM t',
        "SELECT 1\u00a0DELETE\u00a0FROM t",
        "SELECT 1; DROP TABLE t",
        "SELECT 1\0; DROP TABLE t",
        "EXEC('x')",
    ],
)
def test_what_databases_read_in_different_ways_is_refused_for_all(database, query):
    with pytest.raises(UsageError) as refused:
        statements.require_select(query, database)
    assert refused.value.hint
    assert "x'" not in str(refused.value)


@pytest.mark.parametrize(
    ("databases", "query"),
    [
        (set(KINDS) - {"sqlite", "mssql"}, "SELECT ['a]'] AS l, a FROM t; COPY t TO '/x' -- '"),
        ({"sqlite", "mssql", ""}, "SELECT [a]]'b] DELETE FROM t; -- '"),
        ({"mysql", "mariadb", ""}, "SELECT 1 # '\n INTO OUTFILE 0x2f78 # '"),
        (set(KINDS) - {"mysql", "mariadb", "sqlite"}, "SELECT `'`; DROP TABLE t; -- '"),
        (set(KINDS), "SELECT $$'$$; DROP TABLE t; -- '"),
        *(({"mssql", ""}, f"SELECT 1 {word} x") for word in ("SHUTDOWN", "KILL", "BACKUP", "SET", "DBCC", "WAITFOR")),
    ],
)
def test_what_one_database_would_run_is_refused_there(databases, query):
    for database in databases:
        with pytest.raises(UsageError):
            statements.require_select(query, database)


@pytest.mark.parametrize("piece", ["'", '"', "`", "[", "/*", "$a$", "$a", "--", "#", "x.", "''[", "$$'"])
@pytest.mark.parametrize("database", ["", "sqlite", "duckdb"])
def test_long_queries_are_judged(piece, database):
    """What goes back over its tracks again and again would never end here; that it is linear is measured as a bench."""
    with contextlib.suppress(UsageError):
        statements.require_select("SELECT " + piece * (25_000 // len(piece)), database)


@pytest.mark.parametrize(
    "query",
    [
        *CHANGING,
        "",
        ";",
        "SELECT 1; DROP TABLE t",
        "SELECT 1;;",
        "EXPLAIN ANALYZE DELETE FROM t",
        "PRAGMA user_version = 1",
        "WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x",
        "SELECT * INTO other FROM t",
        "SELECT 'a",
        "SELECT /*! 1 */ 2",
        "COPY t TO 'x'",
        "select 1 -- '\n; drop table t",
        "SELECT 'a' /* ' */; DELETE FROM t --'",
        "x" * (1 << 21),
        "SELECT * FROM t FOR UPDATE",
    ],
)
def test_queries_that_do_not_only_read(query):
    with pytest.raises(UsageError) as refused:
        statements.require_select(query)
    assert refused.value.hint
