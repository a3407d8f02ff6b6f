"""A norm of a vision tower with an adapter: a class whose output is that of the plain norm behind the adapter.

`adapt_norm` turns a norm that has its adapter as a child into an instance of a subclass of its own class, and
`release_norm` turns it back, as `decoder_layer.py` does with layers. Every token is routed by itself.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

from torch import Tensor, nn

from mma.decoder_layer import become, replaced_forward
from mma.layer import RoutedRepAdapter


class AdaptedNorm(nn.Module):
    """A base of every class that `adapt_norm` makes.

    Attributes:
        plain: the class of the norm without adapter.
        adapter: plain or routed.
    """

    plain: ClassVar[type[nn.Module]]
    adapter: Any

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the plain norm gives, (..., D), with the update of the adapter."""
        output: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]  # that of the plain class
        if isinstance(self.adapter, RoutedRepAdapter):
            return self.adapter(output, route_tokens(self.adapter, output))
        return self.adapter(output)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as the plain class, from which the reader makes this one again."""
        return _empty, (self.plain,), *tuple(super().__reduce_ex__(protocol))[2:]


def route_tokens(adapter: RoutedRepAdapter, x: Tensor) -> Tensor:
    """Weights (N, P, 2) of the tokens `x` (N, P, D) of N images: what the original gives an image that is alone."""
    return adapter.route(x)


def norm_problem(norm: nn.Module) -> str | None:
    """Why a norm cannot be adapted, or None."""
    return replaced_forward(norm)


def adapt_norm(norm: nn.Module) -> None:
    """Let a norm without `norm_problem` pass its output through the adapter that is its child."""
    become(norm, _adapted_class(type(norm)))


def release_norm(norm: nn.Module) -> None:
    """Give a norm its own class back, if it was adapted."""
    if isinstance(norm, AdaptedNorm):
        become(norm, norm.plain)


@functools.cache
def _adapted_class(plain: type[nn.Module]) -> type[AdaptedNorm]:
    """The class of adapted norms of a class; of the same name, by which others choose what to wrap."""
    own = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(plain.__name__, (AdaptedNorm, plain), {**own, "plain": plain})


def _empty(plain: type[nn.Module]) -> nn.Module:
    kind = _adapted_class(plain)
    return kind.__new__(kind)
