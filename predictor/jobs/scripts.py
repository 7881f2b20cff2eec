"""What happens to a job in Redis in one step, in Lua: Redis runs a script as a whole or not at all.

Keys: `job` is the job's hash, `stream` that of its model, `waiting` the set of ids that wait. A job is one entry of its
stream at a time, named in the hash; the entry leaves the stream when the job is done with. An idempotency key is kept
under the name that the hash's field `key` holds, and lives as long as the hash.
"""

from __future__ import annotations

GROUP = "workers"

# What the others begin with. `drop` takes an entry out of the group and the stream; `expire` lets the job end.
_SHARED = f"""
local GROUP = '{GROUP}'
local function field(job, name) return redis.call('HGET', job, name) or '' end
local function drop(stream, entry)
    redis.call('XACK', stream, GROUP, entry)
    redis.call('XDEL', stream, entry)
end
local function enqueue(job, stream, waiting, id)
    local entry = redis.call('XADD', stream, '*', 'id', id)
    redis.call('HSET', job, 'status', 'queued', 'tokens', 0, 'entry', entry, 'worker', '')
    redis.call('SADD', waiting, id)
end
local function expire(job, seconds)
    redis.call('EXPIRE', job, seconds)
    if field(job, 'key') ~= '' then redis.call('EXPIRE', field(job, 'key'), seconds) end
end
local function awaits_delivery(job)
    local status = field(job, 'status')
    if status ~= 'succeeded' and status ~= 'failed' then return false end
    return field(job, 'webhook') ~= '' and field(job, 'delivery') == ''
end
"""

# KEYS job, stream, waiting, or also the idempotency key; ARGV id, limit, the hash's fields and values.
# The id of the job that is kept, or nil past the limit.
ADD = (
    _SHARED
    + """
local job, stream, waiting, key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local id = ARGV[1]
if redis.call('EXISTS', job) == 1 then return id end -- this very call, sent again by the client library
if key then
    local earlier = redis.call('GET', key)
    if earlier then return earlier end
end
if redis.call('SCARD', waiting) >= tonumber(ARGV[2]) then return false end
if key then redis.call('SET', key, id) end
-- The group stands before the first entry, so that whoever scales workers sees it wait.
redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
redis.call('HSET', job, 'key', key or '', unpack(ARGV, 3))
enqueue(job, stream, waiting, id)
return id
"""
)

# KEYS job, stream, waiting; ARGV id, entry, worker, most starts, the error past them, seconds to expiry.
# 1 if the job is this worker's now.
BEGIN = (
    _SHARED
    + """
local job, stream, waiting = KEYS[1], KEYS[2], KEYS[3]
local id, entry, worker = ARGV[1], ARGV[2], ARGV[3]
if field(job, 'entry') ~= entry then -- removed, or queued again since
    drop(stream, entry)
    return 0
end
local status = field(job, 'status')
if status == 'queued' or status == 'running' then
    redis.call('SREM', waiting, id)
    if tonumber(field(job, 'starts')) < tonumber(ARGV[4]) then
        redis.call('HINCRBY', job, 'starts', 1)
        redis.call('HSET', job, 'status', 'running', 'tokens', 0, 'worker', worker)
        return 1
    end
    redis.call('HSET', job, 'status', 'failed', 'error', ARGV[5])
    expire(job, ARGV[6])
end
if awaits_delivery(job) then
    redis.call('HSET', job, 'worker', worker)
    return 1
end
drop(stream, entry)
return 0
"""
)

# KEYS job, stream; ARGV worker, tokens, of. 1 if the job is still this worker's, whose claim is as new then.
RENEW = (
    _SHARED
    + """
local job, stream = KEYS[1], KEYS[2]
if field(job, 'worker') ~= ARGV[1] then return 0 end
if field(job, 'status') == 'running' then
    redis.call('HSET', job, 'tokens', ARGV[2], 'of', ARGV[3])
elseif not awaits_delivery(job) then
    return 0
end
redis.call('XCLAIM', stream, GROUP, ARGV[1], 0, field(job, 'entry'), 'JUSTID') -- sets its idle time to zero
return 1
"""
)

# KEYS job, stream, waiting; ARGV id, worker, seconds to expiry, the hash's fields and values.
# 1 if the job had not ended: the first end counts, whoever brings it.
FINISH = (
    _SHARED
    + """
local job, stream, waiting = KEYS[1], KEYS[2], KEYS[3]
local status = field(job, 'status')
if status ~= 'queued' and status ~= 'running' then return 0 end
redis.call('HSET', job, 'worker', ARGV[2], unpack(ARGV, 4))
redis.call('SREM', waiting, ARGV[1])
expire(job, ARGV[3])
if not awaits_delivery(job) then drop(stream, field(job, 'entry')) end
return 1
"""
)

# KEYS job, stream; ARGV delivery.
SETTLE = (
    _SHARED
    + """
local job, stream = KEYS[1], KEYS[2]
if not awaits_delivery(job) then return 0 end
redis.call('HSET', job, 'delivery', ARGV[1])
drop(stream, field(job, 'entry'))
return 1
"""
)

# KEYS job, stream, waiting; ARGV id, worker, by how much the count of starts changes.
GIVE_BACK = (
    _SHARED
    + """
local job, stream, waiting = KEYS[1], KEYS[2], KEYS[3]
if field(job, 'worker') ~= ARGV[2] or field(job, 'status') ~= 'running' then return 0 end
drop(stream, field(job, 'entry'))
redis.call('HINCRBY', job, 'starts', ARGV[3])
enqueue(job, stream, waiting, ARGV[1])
return 1
"""
)

# KEYS job, stream, waiting; ARGV id, seconds to expiry. 1 if the job is cancelled now, 2 if it had ended and is gone.
# The entry of one that waits stays until a worker reads it: Redis cannot tell the group's lag once an entry is gone
# that was not delivered, and workers are scaled by that lag.
DELETE = (
    _SHARED
    + """
local job, stream, waiting = KEYS[1], KEYS[2], KEYS[3]
local status = field(job, 'status')
if status == 'queued' or status == 'running' then
    redis.call('SREM', waiting, ARGV[1])
    redis.call('HSET', job, 'status', 'cancelled')
    expire(job, ARGV[2])
    if status == 'running' then drop(stream, field(job, 'entry')) end
    return 1
end
if awaits_delivery(job) then drop(stream, field(job, 'entry')) end
if field(job, 'key') ~= '' then redis.call('DEL', field(job, 'key')) end
redis.call('DEL', job)
return 2
"""
)

# KEYS stream; ARGV worker. Forgets a worker, unless an entry is still its.
LEAVE = (
    _SHARED
    + """
if #redis.call('XPENDING', KEYS[1], GROUP, '-', '+', 1, ARGV[1]) > 0 then return 0 end
return redis.call('XGROUP', 'DELCONSUMER', KEYS[1], GROUP, ARGV[1])
"""
)
