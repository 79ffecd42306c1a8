"""The shared cache pool: a node's arena, index, eviction and tiers, its service, and the client that engines use."""
