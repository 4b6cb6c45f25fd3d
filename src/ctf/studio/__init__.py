"""The studio: a web page that shows how images are generated, and an HTTP API.

It uses `ctf.pipelines` only. FastAPI and uvicorn are installed by `pip install 'ctf[studio]'`.
"""
