"""The transfer protocol as pure state machines (no sockets, clocks, threads or device) and the arithmetic of extents."""
