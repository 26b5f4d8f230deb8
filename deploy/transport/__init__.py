"""Engines under Flower's ``Grid``: mTLS gRPC, in process, Ray."""
