"""Measurements that train or time, and studies made of them."""
