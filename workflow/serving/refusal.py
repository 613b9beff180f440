"""A request that is not answered, and the form in which OpenAI's clients expect to be told."""


class Refusal(Exception):
    """Ends a request with an HTTP `status` and a sentence. `code` and `field` are for programs."""

    def __init__(self, status: int, sentence: str, code: str, field: str | None = None):
        super().__init__(sentence)
        self.status, self.sentence, self.code, self.field = status, sentence, code, field

    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.sentence, "type": kind, "param": self.field, "code": self.code}}
