"""The transfer protocol as pure state machines (no sockets, clocks, threads, device) and the arithmetic of extents."""
