"""AWS as moto plays it, for hsm/tests/aws: on a free port of loopback, which is the first line of output.

Ends when its input ends, so that it never outlives the test.
"""
import sys

from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
