"""Where handlers find their collaborators: keys of the application and of the request."""

from __future__ import annotations

from aiohttp import web

from appliance.api.exchange import Exchange
from appliance.api.services import Services

SERVICES = web.AppKey("services", Services)
EXCHANGE = web.RequestKey("exchange", Exchange)
REQUEST_ID = web.RequestKey("request_id", str)  # what X-Request-Id echoes
KEY_ID = web.RequestKey("key_id", str)  # name of the API key, "" where keys are off
