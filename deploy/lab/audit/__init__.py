"""The audit through the real path: server app, client app, secure sum, in one process."""
