"""Rows of the route table, a module for each family of routes."""
