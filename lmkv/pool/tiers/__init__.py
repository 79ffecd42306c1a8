"""What lies below the arena: disk and object store."""
