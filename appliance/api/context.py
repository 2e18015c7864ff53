"""Where handlers find their collaborators: keys of the application and of the request."""

from __future__ import annotations

from aiohttp import web

from appliance.api.exchange import Exchange
from appliance.api.services import Services
from appliance.api.write_batch import WriteBatch
from appliance.tracing import RequestTrace

SERVICES = web.AppKey("services", Services)
WRITES = web.AppKey("writes", WriteBatch)
EXCHANGE = web.RequestKey("exchange", Exchange)
REQUEST_ID = web.RequestKey("request_id", str)  # what X-Request-Id echoes
TRACE = web.RequestKey("trace", RequestTrace)  # of generation requests
KEY_ID = web.RequestKey("key_id", str)  # name of the API key, "" where keys are off
