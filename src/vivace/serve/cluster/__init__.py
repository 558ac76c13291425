"""The same server on Ray Serve: one door (the HTTP application, without weights) in front of replicas (engines).

The door's application is the plain server's: it draws through a Fleet where the other draws through an Engine. What
waits, waits at the door, so that a replica that dies takes only what it was drawing, and that is drawn elsewhere.
"""
