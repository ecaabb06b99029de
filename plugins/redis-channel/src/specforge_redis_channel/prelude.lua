-- What every script begins with. KEYS[1]: the run's name space, whose braces keep it in one slot of a cluster.
-- ARGV: operation, milliseconds that a heartbeat lasts, '1' where the caller may judge who is dead, the operation's own.
-- An operation returns a word and what belongs to it; 'lapsed': do not judge, and ask again.
local base = KEYS[1]
local TTL, JUDGE = tonumber(ARGV[2]), ARGV[3] == '1'
local META = base .. ':meta'        -- hash: guard, format, counts, the reader, the desk's end
local REFS = base .. ':refs'        -- stream: one entry is one batch of refs
local WRITERS = base .. ':writers'  -- hash: writer -> 'session last-sequence'
local OPEN = base .. ':open'        -- set: writers that did not close
local SEALED = base .. ':sealed'    -- set: of those, the ones that count as closed once they do not live
local FAILED = base .. ':failed'    -- hash: writer -> 'number reason'
local ALIVE = base .. ':alive'      -- sorted set: w:writer or r:session -> when its heartbeat ends, by this clock
local ACKED = base .. ':acked'      -- hash: entry -> 'refs bytes bitmap' where some of its refs are acked
local BATCHES = base .. ':batches'  -- hash: batch -> 'offer attempt json'
local WAITING = base .. ':waiting'  -- sorted set: batches that nobody holds; what came back has a negative score
local HELD = base .. ':held'        -- hash: batch -> 'taking attempt request holder'
local GROUP = 'reader'
local operations = {}

local clock = redis.call('TIME')
local NOW = clock[1] * 1000 + math.floor(clock[2] / 1000)

-- Whoever reaches the server can write under these keys, too: what is not ours is an error that names the key.
local function damaged(key)
  error('DAMAGED ' .. key, 0)
end

-- A full server refuses commands that could grow, unless the script has written before. What beats, acks or finishes
-- must go through: it is what makes room again.
local function even_if_full()
  redis.call('ZREM', ALIVE, '')
end

local function beat(member)
  redis.call('ZADD', ALIVE, NOW + TTL, member)
end

local function lives(member)
  local ends = tonumber(redis.call('ZSCORE', ALIVE, member) or 0)
  if ends > NOW + TTL then  -- this clock went back: it would live for so much longer
    even_if_full()
    beat(member)
  end
  return ends > NOW
end

-- Whether a writer ended: it said so, or (where the caller may judge) its heartbeat did.
local function ended(name)
  if redis.call('SISMEMBER', OPEN, name) == 0 or redis.call('HEXISTS', FAILED, name) == 1 then return true end
  return JUDGE and not lives('w:' .. name)
end

-- Whether the caller's own heartbeat ended although it calls: it stood still, or this server did, and others' may have
-- ended with it.
local function stood_still(member)
  local ends = redis.call('ZSCORE', ALIVE, member)
  return JUDGE and ends and tonumber(ends) <= NOW
end
