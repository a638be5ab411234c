"""The live page: what an engine is doing, in a browser.

Each sequence id is a lane, and time goes to the right. Without a build step, and without anything
from elsewhere: three files, and a stream of server-sent events.
"""

from mtpbatch.server.page.web import OPEN_PATHS, routes

__all__ = ["OPEN_PATHS", "routes"]
