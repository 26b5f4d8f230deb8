"""The engine ``superlink``: the same apps under Flower's own SuperLink and SuperNode, with executors of our own.

Flower's executors unpack the bundle that comes with a run and import it. Ours take the same tasks from the same
interfaces, compare the bundle's hash with the one that this package pins, drop its bytes unread and call the installed
apps. Everything here that touches Flower beyond its public app API is in ``runtime.py``; written against flwr 1.41.
"""
