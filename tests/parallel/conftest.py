from tests.trained import copied, trained

__all__ = ["copied", "trained"]
