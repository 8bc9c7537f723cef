"""Who may call what: one table, one interceptor, and whatever is not in the table is denied."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from fedrt.errors import IdentityError
from fedrt.identity import Identity, Role
from fedrt.tls import peer_identity

ANYONE: frozenset[Role] = frozenset(Role)

# Full RPC name prefix -> roles that may call it with their certificate. Longest prefix wins; no entry means no.
CALLERS: Mapping[str, frozenset[Role]] = {
    "/fedrt.v1.SessionService/": frozenset({Role.SILO}),
    "/fedrt.v1.AdminService/": frozenset({Role.OPERATOR}),
    "/grpc.health.v1.Health/": ANYONE,
    "/grpc.reflection.v1alpha.ServerReflection/": frozenset({Role.OPERATOR}),
}


@dataclass(frozen=True)
class Denial:
    """Why a call is denied."""

    status: grpc.StatusCode
    message: str


def judge(rpc: str, caller: Identity, federation: str, callers: Mapping[str, frozenset[Role]]) -> Denial | None:
    """None if the caller may; pure."""
    if caller.federation != federation:
        return Denial(
            grpc.StatusCode.PERMISSION_DENIED,
            f"this is federation {federation!r}, but the certificate is of federation {caller.federation!r}",
        )
    prefixes = [prefix for prefix in callers if rpc.startswith(prefix)]
    allowed = callers[max(prefixes, key=len)] if prefixes else frozenset()
    if caller.role not in allowed:
        return Denial(grpc.StatusCode.PERMISSION_DENIED, f"{caller} may not call {rpc!r}")
    return None


class Authorization(grpc.aio.ServerInterceptor):
    """Checks the certificate of every caller of a TLS listener against `CALLERS`."""

    def __init__(self, federation: str, callers: Mapping[str, frozenset[Role]] = CALLERS) -> None:
        self._federation = federation
        self._callers = callers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of an RPC so that it runs only for whom the table names."""
        handler = await continuation(handler_call_details)
        return None if handler is None else _guarded(handler, handler_call_details.method, self._check)

    async def _check(self, rpc: str, context: Any) -> None:
        try:
            caller = peer_identity(context.auth_context())
        except IdentityError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            return
        denial = judge(rpc, caller, self._federation, self._callers)
        if denial is not None:
            await context.abort(denial.status, denial.message)


def _guarded(handler: Any, rpc: str, check: Callable[[str, Any], Awaitable[None]]) -> Any:
    async def single(request: Any, context: Any) -> Any:
        await check(rpc, context)
        return await inner(request, context)

    async def stream(request: Any, context: Any) -> Any:
        await check(rpc, context)
        async for response in inner(request, context):
            yield response

    codecs = {
        "request_deserializer": handler.request_deserializer,
        "response_serializer": handler.response_serializer,
    }
    inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(single if _reads_itself(inner) else stream, **codecs)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, **codecs)
    if handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(single, **codecs)
    return grpc.unary_unary_rpc_method_handler(single, **codecs)


def _reads_itself(inner: Any) -> bool:
    """Whether a streaming handler is a coroutine that reads and writes, not a generator of responses."""
    return inspect.iscoroutinefunction(inner)
