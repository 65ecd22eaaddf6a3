"""Tiny random models, their configurations and their inputs; nothing here is a test."""
