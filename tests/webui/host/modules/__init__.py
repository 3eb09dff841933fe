"""What the extension meets of the WebUI: the same names, signatures and order of calls, around a toy model. Checked against real
checkouts by ``test_drift.py`` when ``SEPME_WEBUI`` names some."""
