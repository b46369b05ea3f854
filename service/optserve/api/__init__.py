"""Bytes in, bytes out: the only importer of fastapi. A request meets these files in this order.

``edge``         the outermost layer: there whatever is raised becomes an answer (``problems``)
``routing``      which function it is, and what that function may ask for
``negotiation``  which media type the answer will have; refused before anything is done
``step`` ...     one small module per group of routes: decode, call, encode
``bodies``       the body's bytes, under limits and deadlines
``decode``       fields, tensors and sender out of JSON (``json_text``) or a safetensors frame
``one_call``     the same for a step that may create its session
``waiting``      the session's answer, or whatever else is to happen first; large work is kept off
                 the event loop
``pulling``      pulls that wait for a version, and those that come together
``replies``      JSON or safetensors out of it

``openapi`` joins what the routes say of themselves with ``schemas`` and ``reply_schemas``;
``app`` puts everything together.
"""
