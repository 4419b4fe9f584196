"""Schedules, samplers and losses: they know no model."""
