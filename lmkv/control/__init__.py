"""The ZeroMQ shell of the control plane, and the pairing machine."""
