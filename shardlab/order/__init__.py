"""Device orders: one program, its devices placed otherwise, and what that does to each link."""

from shardlab.order.search import OWN, OrderResult, Orders, best_orders, orders, orders_member

__all__ = ["OWN", "OrderResult", "Orders", "best_orders", "orders", "orders_member"]
