"""A request that is not answered, in the form in which OpenAI's clients read it."""


class Refused(Exception):
    """An HTTP status, and one line with the value and the remedy."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code

    @property
    def body(self) -> dict[str, object]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {"message": str(self), "type": kind, "param": None, "code": self.code},
        }
