"""Proxy losses of many recipes on the Hessians of one store."""
