"""Memory at the close: python tests/review/close_memory.py inorder|reversed|int8"""
import sys, numpy as np, torch, threading, time, os
sys.path.insert(0, '.')
from tests.rounds import Clock, sync, who, ended
from tests.local import create
from optserve.sessions.registry import Registry
from optserve.store import MemoryStore
from optserve_client import wire
mode=sys.argv[1]; N=16
from optserve.store.opening import open_store
import tempfile
d=tempfile.mkdtemp()
from pathlib import Path
store=open_store(url=None,data_dir=Path(d),files=None)
reg=Registry(store,threads=2,alarms=Clock())
shapes={"a":(1<<20,), "b":(1<<22,)}   # 20 MiB
s=create(reg, sync(N), {n:np.zeros(k,np.float32) for n,k in shapes.items()})
def frame(i, order, compress=False):
    if compress:
        t={}
        for n in order:
            k=shapes[n][0]
            t[f"int8/{n}/values"]=np.ones(k,np.int8); t[f"int8/{n}/scales"]=np.ones(-(-k//256),np.float32)
    else: t={f"grad/{n}": np.full(shapes[n],i,np.float32) for n in order}
    import json
    return b"".join(bytes(p) for p in wire.encode(t,{wire.META_KEY: json.dumps({"worker":f"w{i}","seq":1,"base_version":0})}))
def rss(): return int(open('/proc/self/statm').read().split()[1])*4096/2**20
order=["a","b"] if mode!="reversed" else ["b","a"]
peak=[0]; stop=[0]
def watch():
    while not stop[0]:
        peak[0]=max(peak[0],rss()); time.sleep(0.001)
for i in range(N):
    it=s.intake(2**40); it.feed(frame(i,order,mode=="int8")); st=it.finish(); del it
    if i==N-1:
        base=rss(); threading.Thread(target=watch).start()
    r=s.step(st, who(f"w{i}",1,i)).result(60); del st
ended(r); stop[0]=1
print(mode, "gradient 20 MiB, workers",N,"rss before",round(base),"peak more",round(peak[0]-base),"MiB")
reg.close(); import shutil; shutil.rmtree(d)
