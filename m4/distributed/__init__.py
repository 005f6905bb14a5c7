"""Devices and processes: the mesh, hosts, worker processes."""
