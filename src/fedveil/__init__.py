"""fedveil: federated learning whose privacy claim anybody can check."""

__version__ = "0.1.0"
