"""The only room that knows both sides: transports, the simulator, the demo, provisioning."""
