"""Token orders (specification, section 8)."""

from shared_specs.order.base import Centroids, OrderState, Permutation, TokenOrderBase
from shared_specs.order.clustering import kmeans
from shared_specs.order.gilbert import gilbert_order
from shared_specs.order.sta import sta_order
from shared_specs.order.token_order import TokenOrder

__all__ = [
    "Centroids",
    "OrderState",
    "Permutation",
    "TokenOrder",
    "TokenOrderBase",
    "gilbert_order",
    "kmeans",
    "sta_order",
]
