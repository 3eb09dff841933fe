"""A package, so that server and browser can be closed with its last test: Playwright's event loop is in the way of others."""
