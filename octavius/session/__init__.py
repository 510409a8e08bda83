"""Talking with a model: a conversation in Python, and the same in a terminal."""

from octavius.session.conversation import Reply, Scan, Session, chat

__all__ = ["Reply", "Scan", "Session", "chat"]
