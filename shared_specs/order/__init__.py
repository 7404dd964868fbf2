"""Token orders (specification, section 8)."""

from shared_specs.order.gilbert import gilbert_order
from shared_specs.order.kmeans import kmeans
from shared_specs.order.plan import OrderPlan
from shared_specs.order.sta import sta_order
from shared_specs.order.token_order import Centroids, OrderState, TokenOrder

__all__ = [
    "Centroids",
    "OrderPlan",
    "OrderState",
    "TokenOrder",
    "gilbert_order",
    "kmeans",
    "sta_order",
]
