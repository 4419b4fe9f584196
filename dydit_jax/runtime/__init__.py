"""Devices, processes, compiled programs, logs: what a run stands on."""
