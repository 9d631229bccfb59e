"""The simulator: serving policies replayed against a cost profile, without an engine or a device."""
