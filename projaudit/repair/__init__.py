"""A projector with the suspicious part of its update taken out, and the audit of what is left."""
