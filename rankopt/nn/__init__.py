"""Modules that a Sequential of plain layers can't express."""
