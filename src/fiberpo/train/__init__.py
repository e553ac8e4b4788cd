"""The single-machine training program behind ``fiberpo train``."""
