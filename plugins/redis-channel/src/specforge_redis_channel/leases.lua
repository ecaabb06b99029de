-- The lease desk: batches offered and not finished.

local function record_of(key)
  local text = redis.call('HGET', BATCHES, key)
  if not text then return nil end
  local number, attempt, json = string.match(text, '^(%d+) (%d+) (.*)$')
  if not number then damaged(BATCHES) end
  return number, tonumber(attempt), json
end

local function come_back(key)
  redis.call('HDEL', HELD, key)
  local turn = redis.call('HINCRBY', META, 'returned', 1)
  redis.call('ZADD', WAITING, turn - 1099511627776, key)
end

-- What the ended hold comes back in the order it was taken; the attempts count.
-- Returns the batch that this very request took, where its reply was lost.
local function look_through_held(request)
  local own, lost = nil, {}
  local held = redis.call('HGETALL', HELD)
  for i = 1, #held, 2 do
    local taking, _, asked, holder = string.match(held[i + 1], '^(%d+) (%d+) (%S+) (.*)$')
    if not taking then damaged(HELD) end
    if ended(holder) then
      table.insert(lost, {tonumber(taking), held[i]})
    elseif asked == request then
      own = held[i]
    end
  end
  table.sort(lost, function(a, b) return a[1] < b[1] end)
  for _, entry in ipairs(lost) do come_back(entry[2]) end
  return own
end

local function is_held(key, holder, attempt)
  local text = redis.call('HGET', HELD, key)
  if not text then return false end
  local held_attempt, _, held_by = string.match(text, '^%d+ (%d+) (%S+) (.*)$')
  return held_attempt == attempt and held_by == holder
end

function operations.offer(...)
  redis.call('HDEL', META, 'ended')
  local batches = {...}
  for i = 1, #batches, 2 do
    local key = batches[i]
    if redis.call('HEXISTS', BATCHES, key) == 0 then
      local number = redis.call('HINCRBY', META, 'offered', 1)
      redis.call('HSET', BATCHES, key, number .. ' 0 ' .. batches[i + 1])
      redis.call('ZADD', WAITING, number, key)
    end
  end
  return {'ok'}
end

function operations.take(holder, request)
  even_if_full()
  if stood_still('w:' .. holder) then return {'lapsed'} end
  if ended(holder) then return {'unknown'} end
  local own = look_through_held(request)
  if own then
    local _, attempt, json = record_of(own)
    return {'lease', attempt, json}
  end
  local key = redis.call('ZRANGE', WAITING, 0, 0)[1]
  if not key then return {redis.call('HEXISTS', META, 'ended') == 1 and 'ended' or 'none'} end
  local number, attempt, json = record_of(key)
  redis.call('ZREM', WAITING, key)
  if not number then return {'none'} end
  attempt = attempt + 1
  local taking = redis.call('HINCRBY', META, 'taken', 1)
  redis.call('HSET', BATCHES, key, number .. ' ' .. attempt .. ' ' .. json)
  redis.call('HSET', HELD, key, taking .. ' ' .. attempt .. ' ' .. request .. ' ' .. holder)
  return {'lease', attempt, json}
end

function operations.finish(key, holder, attempt)
  even_if_full()
  if is_held(key, holder, attempt) then
    redis.call('HDEL', HELD, key)
    redis.call('HDEL', BATCHES, key)
  end
  return {'ok'}
end

function operations.give_back(key, holder, attempt)
  even_if_full()
  if is_held(key, holder, attempt) then
    local number, count, json = record_of(key)
    redis.call('HSET', BATCHES, key, number .. ' ' .. (count - 1) .. ' ' .. json)
    come_back(key)
  end
  return {'ok'}
end

function operations.outstanding()
  return {'ok', redis.call('HVALS', BATCHES)}
end

-- 'end' is a word of the language.
operations['end'] = function(reason)
  even_if_full()
  redis.call('DEL', BATCHES, WAITING, HELD)
  redis.call('HSET', META, 'ended', reason)
  return {'ok'}
end

function operations.ended()
  return {'ok', redis.call('HGET', META, 'ended')}
end

return operations[ARGV[1]](unpack(ARGV, 4))
