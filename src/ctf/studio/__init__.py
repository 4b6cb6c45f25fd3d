"""The studio: a page to watch pictures being made, and an HTTP API beside it.

It calls `ctf.pipelines` only. FastAPI and uvicorn come with `pip install
'ctf[studio]'`.
"""
