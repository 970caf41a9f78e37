"""Audio towers: encoders that turn mel features of sound into embeddings of a text model."""
