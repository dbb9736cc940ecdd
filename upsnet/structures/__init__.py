"""Small typed containers that every other room may use."""
