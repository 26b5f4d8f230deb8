"""Who takes part: a consortium's authority, members' requests, the roster, revocation."""
