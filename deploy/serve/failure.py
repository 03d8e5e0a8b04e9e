"""An answer that did not come, and why."""

from __future__ import annotations


class Failure(Exception):
    """`kind` is what the log and the metrics count, `status` what the client gets, `param` the field at fault.

    `request_fault`: the request is to blame and not the back end, so that it says nothing of an arm.
    """

    def __init__(
        self,
        kind: str,
        detail: str = "",
        *,
        status: int = 502,
        retry_after: str | None = None,
        param: str | None = None,
        request_fault: bool = False,
    ) -> None:
        super().__init__(detail or kind)
        self.kind = kind
        self.detail = detail or kind
        self.status = status
        self.retry_after = retry_after
        self.param = param
        self.request_fault = request_fault

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error as the OpenAI API words it."""
        kind = "invalid_request_error" if 400 <= self.status < 500 else "server_error"
        code = self.kind.replace(" ", "_")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": code}}
