"""The drawn world: pictures whose truth is known, their captions and edits, and the small models that ship."""
