"""Shared by all rooms: atomic files, folders and whose they are, configuration, processes."""
