"""Ledgers, metrics, logging."""
