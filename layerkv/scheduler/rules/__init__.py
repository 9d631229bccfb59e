"""The rules of the policy: each a function ``(now, draft) -> None`` that reads an outlook and speaks to a draft."""
