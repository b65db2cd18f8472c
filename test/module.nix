# nix/module.nix and nix/client-module.nix in many situations: `failures` holds what is not as it should be, `written`
# every configuration file, `service` what is different in the unit, `size` the script that makes a file system, and
# `client` what a client has Nix run and do.
# With the lib of nixpkgs where NIXPKGS_LIB says, else with a stand-in.
{
  lib ? import (
    let
      path = builtins.getEnv "NIXPKGS_LIB";
    in
    if path == "" then ./support/nixpkgs/lib else path
  ),
}:
let
  inherit (builtins)
    attrNames
    concatMap
    filter
    head
    listToAttrs
    mapAttrs
    match
    ;
  inherit (lib.types) anything attrsOf listOf;
  # As much of a package as the module looks at.
  package = name: {
    inherit name;
    type = "derivation";
    outPath = "/${name}";
    meta.mainProgram = name;
  };

  # The flake, as if nixpkgs had no packages: its modules need the lib alone.
  flake = import ../nix/outputs.nix {
    nixpkgs = {
      inherit lib;
      legacyPackages = { };
    };
  };
  inherit (flake) nixosModules;

  # As much of nixpkgs as the module uses. A configuration file is its own path, so that it can be seen.
  pkgs = {
    callPackage = _: _: package "nix-relay";
    formats.toml = _: {
      type = anything;
      generate = _: builtins.toJSON;
    };
    runCommand =
      _: environment: script:
      assert match ".*\"\\$check\" --check \"\\$written\".*" script != null;
      "${environment.check} ${environment.written}";
    stdenv.buildPlatform.canExecute = _: true;
    bash = "/bash";
    coreutils = "/coreutils";
    stdenv.hostPlatform.system = "x86_64-linux";
    e2fsprogs = package "e2fsprogs";
    runCommandLocal =
      name: _: script:
      "/${name}: ${script}";
    systemd = "/systemd";
    writeShellScript = name: text: "/${name}: ${text}";
    writeText = name: text: "/${name}: ${text}";
    bubblewrap = package "bubblewrap";
    util-linux = package "util-linux";
  };

  # And as much of NixOS.
  nixos = import ./support/nixpkgs/nixos.nix {
    inherit lib;
    nix = package "nix";
  };

  # The line of /etc/nix/machines, as NixOS makes it.
  line =
    machine:
    let
      comma = words: if words == [ ] then "-" else builtins.concatStringsSep "," words;
    in
    builtins.concatStringsSep " " [
      "${machine.protocol}://${machine.hostName}"
      (comma machine.systems)
      "-"
      (toString machine.maxJobs)
      (toString machine.speedFactor)
      (comma (machine.supportedFeatures ++ machine.mandatoryFeatures))
      (comma machine.mandatoryFeatures)
      "-"
    ];

  # What a machine with this configuration has of nix-relay.
  see =
    configuration:
    let
      inherit
        (lib.evalModules {
          modules = [
            # Under both names, as one may import it.
            nixosModules.default
            nixosModules.nix-relay
            nixosModules.client
            nixos
            configuration
          ];
          specialArgs = { inherit pkgs; };
        })
        config
        ;
      # The script is its own path.
      builder = match "(.*)/nix-relay-builder: (.*\n)( .*)" (line (head config.nix.buildMachines));
      unit = config.systemd.services.nix-relay or config.systemd.services."nix-relay@";
      start = match "/nix-relay/bin/nix-relay /nix-relay/bin/nix-relay (.*)" (
        lib.last unit.serviceConfig.ExecStart
      );
    in
    {
      wrong = map (a: a.message) (filter (a: !a.assertion) config.assertions);
      inherit (config) warnings;
      toml = builtins.fromJSON (head start);
      ports = config.networking.firewall.allowedTCPPorts;
      nix = config.nix.settings;
      inherit (config.nix) buildMachines distributedBuilds;
      builder = builtins.elemAt builder 1;
      line = "${head builder}/nix-relay-builder${lib.last builder}";
      inherit (config.systemd)
        mounts
        packages
        services
        sockets
        targets
        tmpfiles
        ;
      inherit unit;
      inherit (config) users;
      inherit (config.services) nginx;
      reset = head unit.serviceConfig.ExecStart;
      stop = unit.serviceConfig.TimeoutStopSec;
      location = config.services.nginx.virtualHosts."relay.example.com".locations."= /relay";
      elsewhere = config.services.nginx.virtualHosts."relay.example.com".locations."/";
    };

  with' = relay: {
    services.nix-relay = {
      enable = true;
    }
    // relay;
  };
  client = client: {
    services.nix-relay-client = {
      enable = true;
      url = "wss://relay.example.com";
      tokenFile = "/run/keys/it's";
    }
    // client;
  };
  turns =
    more:
    with' (
      {
        takeTurns = true;
        socketActivation = true;
        settings.auth.allowed_org = "org";
      }
      // more
    );
  settings =
    settings:
    with' {
      settings = {
        auth.allowed_org = "org";
      }
      // settings;
    };
  listen = listen: settings { server = { inherit listen; }; };
  open =
    at:
    with' {
      openFirewall = true;
      settings = {
        auth.allowed_org = "org";
        server.listen = at;
      };
    };
  nginx =
    settings:
    with' {
      nginx = {
        enable = true;
        domain = "relay.example.com";
      };
      settings = {
        auth.allowed_org = "org";
      }
      // settings;
    };
  no-nginx = {
    enable = false;
    virtualHosts = { };
  };
  # A machine that has more than the relay.
  beside = relay: more: lib.recursiveUpdate relay more;
  timeouts =
    seconds:
    "proxy_set_header X-Forwarded-For $remote_addr;\n"
    + "proxy_buffer_size 64k;\nproxy_buffers 8 64k;\n"
    + "proxy_read_timeout ${seconds}s;\nproxy_send_timeout ${seconds}s;\nsend_timeout ${seconds}s;\n";
  rule = {
    name = "main";
    bound_claims = {
      ref = [
        "main"
        "release-*"
      ];
      repository = "org/*";
    };
  };
  everything = {
    server = {
      listen = "[::]:8081";
      admin_listen = "127.0.0.1:9090";
      shutdown_grace_secs = 3600;
      handshake_timeout_secs = 5;
      keepalive_secs = 0;
    };
    auth = {
      issuer = "https://gitlab.example.com";
      audience = "https://relay.example.com";
      allowed_org = "org";
      jwks_cache_ttl_secs = 60;
      rule = [ rule ];
    };
    daemon = {
      nix_daemon_path = "/other";
      extra_args = [ ];
      timeout_secs = 60;
      max_connections = 1;
      queue_timeout_secs = 0;
    };
  };
  full = {
    jwks_files."https://gitlab.example.com" = "/etc/gitlab.json";
    rule = {
      name = "all";
      issuer = "https://gitlab.example.com";
      bound_claims = {
        ref_protected = true;
        project_id = 7;
        user_id = [
          1
          "2"
          false
        ];
      };
      audience = "https://other.example.com";
      extra_args = [ "--stdio" ];
      max_connections = 4;
    };
  };
  # The defaults of the binary, but for this.
  with-defaults = lib.recursiveUpdate (
    lib.recursiveUpdate (lib.importTOML ../config.example.toml) {
      daemon.nix_daemon_path = "/nix/bin/nix-daemon";
      auth = {
        jwks_files = { };
        rule = [ ];
      };
    }
  );

  wanted = configuration: (see configuration).targets.multi-user.wants;
  instances = more: wanted (turns more);

  # What is given; and what is seen then, where a function says whether it is right.
  situations = {
    disabled = {
      given = { };
      seen = {
        wrong = [ ];
        ports = [ ];
        packages = [ ];
        services = { };
        sockets = { };
        nix = { };
        buildMachines = [ ];
        distributedBuilds = false;
        nginx = no-nginx;
        warnings = [ ];
        tmpfiles.rules = [ ];
      };
    };
    least = {
      given = settings { };
      seen = {
        wrong = [ ];
        warnings = [ ];
        toml = with-defaults { auth.allowed_org = "org"; };
        reset = "";
        stop = 60;
        ports = [ ];
        packages = [ (package "nix-relay") ];
        nix.extra-allowed-users = [ "nix-relay" ];
        nginx = no-nginx;
        users = {
          groups.nix-relay = { };
          users.nix-relay = {
            group = "nix-relay";
            isSystemUser = true;
          };
        };
        sockets = { };
        services = services: attrNames services == [ "nix-relay" ];
        # With a package that lacks the unit, systemd has none of that name, and starts nothing.
        unit =
          unit:
          unit.overrideStrategy == "asDropin"
          && unit.serviceConfig.User == "nix-relay"
          && !unit ? requires
          && !unit.stopIfChanged
          && unit.wantedBy == [ "multi-user.target" ]
          && unit.environment == { SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt"; };
      };
    };
    proxy = {
      given = settings { } // {
        networking.proxy.envVars.https_proxy = "http://proxy:3128";
      };
      seen.unit =
        unit:
        unit.environment == {
          https_proxy = "http://proxy:3128";
          SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt";
        };
    };
    overridden = {
      given = settings { } // {
        networking.proxy.envVars.https_proxy = "http://proxy:3128";
        systemd.services.nix-relay = {
          environment = {
            https_proxy = "http://other:3128";
            SSL_CERT_FILE = "/own.pem";
          };
          serviceConfig.TimeoutStopSec = "2h";
        };
      };
      seen = {
        stop = "2h";
        unit =
          unit:
          unit.environment == {
            https_proxy = "http://other:3128";
            SSL_CERT_FILE = "/own.pem";
          };
      };
    };
    socket = {
      given = with' {
        socketActivation = true;
        settings.auth.allowed_org = "org";
      };
      seen = {
        wrong = [ ];
        unit = unit: unit.requires == [ "nix-relay.socket" ];
        sockets.nix-relay = {
          overrideStrategy = "asDropin";
          wantedBy = [ "sockets.target" ];
          socketConfig.ListenStream = [
            ""
            "0.0.0.0:8080"
          ];
        };
      };
    };
    turns = {
      given = turns { };
      seen = {
        wrong = [ ];
        services =
          services:
          attrNames services == [ "nix-relay@" ]
          && (
            let
              unit = services."nix-relay@";
            in
            unit.overrideStrategy == "asDropin"
            && !unit.restartIfChanged
            && !unit ? wantedBy
            && unit.requires == [ "nix-relay.socket" ]
            && unit.serviceConfig.Sockets == "nix-relay.socket"
            && unit.serviceConfig.TimeoutStopSec == 3630
            && match "-\\+/nix-relay-retire: .* %n" unit.serviceConfig.ExecStartPost != null
          );
        toml = toml: toml.server.shutdown_grace_secs == 3600;
        sockets = sockets: [ sockets.nix-relay.socketConfig.Service ] == instances { };
        packages = packages: match "/nix-relay-units: .*" (head packages) != null;
      };
    };
    # What is not the same has another instance, and what is has the same.
    turns-of-one-configuration = {
      given = turns { };
      seen.targets =
        { multi-user, ... }:
        multi-user.wants == instances { }
        && multi-user.wants != instances { settings.auth.allowed_org = "other"; }
        &&
          multi-user.wants
          != wanted (beside (turns { }) { systemd.services."nix-relay@".serviceConfig.MemoryMax = "4G"; })
        && match "nix-relay@[0-9a-f]{12}\\.service" (head multi-user.wants) != null;
    };
    turns-with-stores = {
      given = turns { stores.own.rule = { inherit (rule) bound_claims; }; };
      seen = {
        wrong = [ ];
        services =
          services:
          !services ? nix-relay && services."nix-relay@".serviceConfig.StateDirectory == "nix-relay";
      };
    };
    turns-without-a-socket = {
      given = turns { socketActivation = false; };
      seen.wrong = wrong ".*set services.nix-relay.socketActivation to true\\.";
    };
    turns-with-one-port-for-metrics = {
      given = turns {
        settings = {
          auth.allowed_org = "org";
          server.admin_listen = "127.0.0.1:9090";
        };
      };
      seen.wrong = wrong ".*listen on 127.0.0.1:9090: set .*admin_listen to \"\", or .*takeTurns to false\\.";
    };
    socket-ipv6 = {
      given = with' {
        socketActivation = true;
        settings = {
          auth.allowed_org = "org";
          server.listen = "[::]:443";
        };
      };
      seen = {
        wrong = [ ];
        sockets =
          sockets:
          sockets.nix-relay.socketConfig.ListenStream == [
            ""
            "[::]:443"
          ];
      };
    };
    everything = {
      given = settings everything;
      seen = {
        wrong = [ ];
        stop = 3630;
        toml = with-defaults everything;
      };
    };
    rules-alone = {
      given = with' { settings.auth.rule = [ rule ]; };
      seen = {
        wrong = [ ];
        toml = with-defaults { auth.rule = [ rule ]; };
      };
    };
    all-that-a-rule-may-say = {
      given = with' {
        settings.auth = {
          inherit (full) jwks_files;
          rule = [
            full.rule
            rule
          ];
        };
      };
      seen = {
        wrong = [ ];
        toml = with-defaults {
          auth = {
            inherit (full) jwks_files;
            rule = [
              full.rule
              rule
            ];
          };
        };
      };
    };
    another-nix = {
      given = settings { } // {
        nix.package = package "lix";
      };
      seen.toml = toml: toml.daemon.nix_daemon_path == "/lix/bin/nix-daemon";
    };
    another-package = {
      given = with' {
        package = package "nix-relay" // {
          name = "other";
        };
        settings.auth.allowed_org = "org";
      };
      seen.packages = packages: map (p: p.name) packages == [ "other" ];
    };
    trusted = {
      given = with' {
        trustClients = true;
        settings.auth.allowed_org = "org";
      };
      seen.nix = {
        extra-allowed-users = [ "nix-relay" ];
        extra-trusted-users = [ "nix-relay" ];
      };
    };
    stores = {
      given = with' {
        settings.auth.rule = [ rule ];
        stores.own.rule = { inherit (rule) bound_claims; };
        stores.offline = {
          rule = {
            inherit (rule) bound_claims;
            max_connections = 2;
          };
          network = false;
          size = "20G";
          nixConf = "cores = 2";
          dates = "daily";
        };
      };
      seen = {
        wrong = [ ];
        toml =
          toml:
          match ".*/[a-z0-9]+-nix-relay-store" toml.daemon.nix_daemon_path != null
          &&
            toml.auth.rule == [
              rule
              {
                name = "offline";
                inherit (rule) bound_claims;
                max_connections = 2;
                extra_args = [
                  "/var/lib/nix-relay/offline"
                  "--ro-bind"
                  "/nix.conf: cores = 2"
                  "/etc/nix/store.conf"
                  "--unshare-net"
                  "--"
                  "nix-daemon"
                  "--stdio"
                ];
              }
              {
                name = "own";
                inherit (rule) bound_claims;
                extra_args = [
                  "/var/lib/nix-relay/own"
                  "--ro-bind"
                  "/nix.conf: "
                  "/etc/nix/store.conf"
                  "--"
                  "nix-daemon"
                  "--stdio"
                ];
              }
            ];
        unit =
          unit:
          unit.serviceConfig.StateDirectory == "nix-relay"
          && unit.serviceConfig.RestrictNamespaces == "no"
          && builtins.length unit.serviceConfig.SystemCallFilter == 2
          && unit.unitConfig.RequiresMountsFor == [ "/var/lib/nix-relay/offline" ]
          && !unit.serviceConfig ? Environment
          &&
            map (p: p.name) unit.path == [
              "nix"
              "bubblewrap"
              "util-linux"
            ];
        services =
          services:
          services.nix-relay-gc-offline.startAt == "daily"
          && services.nix-relay-gc-own.startAt == "weekly"
          && services.nix-relay-gc-own.serviceConfig.User == "nix-relay"
          && services.nix-relay-gc-own.unitConfig.RequiresMountsFor == "/var/lib/nix-relay/own"
          &&
            match ".*-nix-relay-store /var/lib/nix-relay/own -- /bin/sh -c +'find /tmp .* exec nix-store --gc'" services.nix-relay-gc-own.serviceConfig.ExecStart
            != null
          && services ? nix-relay-size-offline
          && !services ? nix-relay-size-own;
        mounts = [
          {
            what = "/var/lib/nix-relay-offline.img";
            where = "/var/lib/nix-relay/offline";
            type = "ext4";
            options = "loop,nofail,nosuid,nodev";
            requires = [ "nix-relay-size-offline.service" ];
            after = [ "nix-relay-size-offline.service" ];
          }
        ];
      };
    };
    closed-firewall = {
      given = listen "0.0.0.0:443";
      seen.ports = [ ];
    };
    open-default = {
      given = with' {
        openFirewall = true;
        settings.auth.allowed_org = "org";
      };
      seen = {
        wrong = [ ];
        ports = [ 8080 ];
      };
    };
    open-ipv4 = {
      given = open "192.0.2.1:1024";
      seen = {
        wrong = [ ];
        warnings = warned ".*192.0.2.1:1024, where tokens arrive unencrypted.* set services.nix-relay.nginx.enable .*";
        ports = [ 1024 ];
      };
    };
    open-ipv6 = {
      given = open "[2001:db8::1]:8443";
      seen = {
        wrong = [ ];
        ports = [ 8443 ];
      };
    };
    open-name = {
      given = open "relay.example.com:8081";
      seen = {
        wrong = [ ];
        ports = [ 8081 ];
      };
    };
    nginx = {
      given = nginx { };
      seen = {
        wrong = [ ];
        ports = [ ];
        toml =
          toml: toml.server.listen == "127.0.0.1:8080" && toml.auth.audience == "https://relay.example.com";
        nginx =
          nginx:
          nginx.enable
          && nginx.virtualHosts."relay.example.com".forceSSL
          && nginx.virtualHosts."relay.example.com".enableACME;
        elsewhere = {
          return = "404";
        };
        location = {
          proxyPass = "http://127.0.0.1:8080";
          proxyWebsockets = true;
          recommendedProxySettings = false;
          extraConfig = timeouts "3690";
        };
      };
    };
    nginx-elsewhere = {
      given = nginx {
        server.listen = "[::1]:8081";
        daemon = {
          timeout_secs = 86400;
          queue_timeout_secs = 0;
        };
      };
      seen = {
        wrong = [ ];
        location =
          location: location.proxyPass == "http://[::1]:8081" && location.extraConfig == timeouts "86460";
      };
    };
    nginx-own-certificate = {
      given.services = (nginx { }).services // {
        nginx.virtualHosts."relay.example.com" = {
          enableACME = false;
          sslCertificate = "/cert";
        };
      };
      seen.nginx =
        nginx:
        !nginx.virtualHosts."relay.example.com".enableACME
        && nginx.virtualHosts."relay.example.com".forceSSL;
    };

    nginx-own-audience = {
      given = nginx {
        auth = {
          audience = "other";
          allowed_org = "org";
        };
      };
      seen.toml = toml: toml.auth.audience == "other";
    };
    nginx-certificate-of-another-name = {
      given = beside (nginx { }) {
        services.nginx.virtualHosts."relay.example.com".useACMEHost = "example.com";
      };
      seen.nginx =
        nginx:
        !nginx.virtualHosts."relay.example.com".enableACME
        && nginx.virtualHosts."relay.example.com".forceSSL;
    };
    nginx-with-more-to-see = {
      given = beside (nginx { }) {
        services.nginx.virtualHosts."relay.example.com".locations."/".proxyPass = "http://127.0.0.1:3000";
      };
      seen = {
        elsewhere.proxyPass = "http://127.0.0.1:3000";
        location = location: location.proxyPass == "http://127.0.0.1:8080";
      };
    };
    masked = {
      given = beside (settings { }) { systemd.services.nix-relay.enable = false; };
      seen = {
        wrong = [ ];
        unit = unit: !unit.enable && unit.overrideStrategy == "asDropinIfExists";
      };
    };
    kept = {
      given = with' {
        keepResults = 7;
        settings.auth.allowed_org = "org";
      };
      seen = {
        wrong = [ ];
        nix = nix: match ".*ln -sfn .*/nix/var/nix/gcroots/nix-relay/.*" nix.post-build-hook != null;
        tmpfiles.rules = [ "d /nix/var/nix/gcroots/nix-relay 0755 root root m:7d" ];
      };
    };
    reserved-port-of-systemd = {
      given = with' {
        socketActivation = true;
        settings = {
          auth.allowed_org = "org";
          server.listen = "0.0.0.0:80";
        };
      };
      seen.wrong = [ ];
    };
    everybody-is-trusted = {
      given = beside (settings { }) { nix.settings.trusted-users = [ "*" ]; };
      seen = {
        wrong = [ ];
        warnings = warned ".*trusted-users .* become root.* set services.nix-relay.trustClients .*";
      };
    };
    everybody-is-trusted-as-well = {
      given = beside (settings { }) { nix.settings.extra-trusted-users = "*"; };
      seen.warnings = warned ".*trusted-users .*";
    };
    another-is-trusted = {
      given = beside (settings { }) {
        nix.settings.trusted-users = [
          "root"
          "@wheel"
        ];
      };
      seen.warnings = [ ];
    };
    everybody-is-trusted-as-is-meant = {
      given = {
        nix.settings.trusted-users = [ "*" ];
      }
      // with' {
        trustClients = true;
        settings.auth.allowed_org = "org";
      };
      seen.warnings = [ ];
    };
    without-nix = {
      given = beside (settings { }) { nix.enable = false; };
      seen = {
        wrong = [ ];
        warnings = warned "nix.enable is false.* allowed-users .*";
      };
    };

    client = {
      given = client { };
      seen = {
        wrong = [ ];
        warnings = [ ];
        services = services: services.nix-daemon.path == [ "/bash" ];
        distributedBuilds = true;
        nix.builders-use-substitutes = true;
        line = "ssh-ng://localhost?remote-program=/nix-relay-builder x86_64-linux - 4 1 benchmark,big-parallel,nixos-test - -";
        builder = exports {
          NIX_RELAY_TOKEN_COMMAND = "cat '/run/keys/it'\\''s'";
          NIX_RELAY_URL = "wss://relay.example.com";
          SSL_CERT_FILE = "/etc/ssl/certs/ca-certificates.crt";
        };
      };
    };
    client-with-all = {
      given = client {
        tokenFile = null;
        tokenCommand = "printf '%s' \"$NIX_RELAY_AUDIENCE\"";
        audience = "https://relay.example.com";
        environment = {
          NIX_RELAY_RETRY_SECS = "5";
          SSL_CERT_FILE = "/own.pem";
        };
        systems = [
          "aarch64-linux"
          "i686-linux"
        ];
        maxJobs = 8;
        speedFactor = 2;
        supportedFeatures = [ "kvm" ];
        mandatoryFeatures = [ "slow" ];
      };
      seen = {
        wrong = [ ];
        line = "ssh-ng://localhost?remote-program=/nix-relay-builder aarch64-linux,i686-linux - 8 2 kvm,slow slow -";
        builder = exports {
          NIX_RELAY_AUDIENCE = "https://relay.example.com";
          NIX_RELAY_RETRY_SECS = "5";
          NIX_RELAY_TOKEN_COMMAND = "printf '%s' \"$NIX_RELAY_AUDIENCE\"";
          NIX_RELAY_URL = "wss://relay.example.com";
          SSL_CERT_FILE = "/own.pem";
        };
      };
    };
    client-beside-others = {
      given = beside (client { }) { nix.buildMachines = [ { hostName = "other"; } ]; };
      seen.buildMachines = machines: builtins.length machines == 2;
    };
    client-beside-the-relay = {
      given = beside (settings { }) (client { });
      seen.wrong = [ ];
    };
    client-without-a-token = {
      given = client { tokenFile = null; };
      seen.wrong = wrong ".*set either .*tokenFile or .*tokenCommand\\.";
    };
    client-with-two = {
      given = client { tokenCommand = "true"; };
      seen.wrong = wrong ".*set either .*tokenFile or .*tokenCommand\\.";
    };
    client-with-its-token-in-the-store = {
      given = client { tokenFile = "${builtins.storeDir}/token"; };
      seen.wrong = wrong ".*set .*tokenFile to a file elsewhere.*";
    };
    client-with-its-token-in-the-open = {
      given = client { environment.NIX_RELAY_TOKEN = "token"; };
      seen.wrong = wrong ".*set .*tokenFile to a file that has it\\.";
    };
    client-without-nix = {
      given = beside (client { }) { nix.enable = false; };
      seen.wrong = wrong "nix.enable is false.*set nix.enable to true.*";
    };

    store-for-everybody = {
      given = with' { stores.own = { }; };
      seen.wrong = wrong ".*set bound_claims .*";
    };
    store-elsewhere = {
      given = with' { stores."../other".rule = { inherit (rule) bound_claims; }; };
      seen.wrong = wrong ".*cannot have \"../other\": use letters.*";
    };
    # Each assertion alone; its message names what to set.
    reserved-port = {
      given = listen "0.0.0.0:1023";
      seen.wrong = wrong ".*0.0.0.0:1023, .* set services.nix-relay.socketActivation to true, .*";
    };
    reserved-admin-port = {
      given = settings { server.admin_listen = "127.0.0.1:99"; };
      seen.wrong = wrong ".*127.0.0.1:99, .* set .*server.admin_listen .*";
    };
    nobody = {
      given = with' { };
      seen.wrong = wrong ".*set services.nix-relay.settings.auth.allowed_org .*";
    };
    everybody = {
      given = with' {
        settings.auth.rule = [
          rule
          { name = "x"; }
        ];
      };
      seen.wrong = wrong ".*set bound_claims .*services.nix-relay.settings.auth.rule\\.";
    };
    no-port = {
      given = open "0.0.0.0";
      seen = {
        wrong = wrong ".*\"0.0.0.0\": set .*server.listen .*";
        ports = [ ];
      };
    };
    no-such-port = {
      given = open "0.0.0.0:65536";
      seen = {
        wrong = wrong ".*\"0.0.0.0:65536\": set .*server.listen .*";
        ports = [ ];
      };
    };
    no-port-at-all = {
      given = open "0.0.0.0:0";
      seen.wrong = wrong ".*\"0.0.0.0:0\": set .*server.listen .*";
    };
    no-number = {
      given = listen "host:http";
      seen.wrong = wrong ".*\"host:http\": set .*server.listen .*";
    };
    open-loopback = {
      given = open "127.0.0.1:8080";
      seen.wrong = wrong ".*openFirewall.* set .*server.listen .*";
    };
    open-loopback-ipv6 = {
      given = open "[::1]:8080";
      seen.wrong = wrong ".*openFirewall.* set .*";
    };
    open-loopback-name = {
      given = open "localhost:8080";
      seen.wrong = wrong ".*openFirewall.* set .*";
    };
    open-nginx = {
      given.services.nix-relay = (nginx { }).services.nix-relay // {
        openFirewall = true;
      };
      seen.wrong = wrong ".*set networking.firewall.allowedTCPPorts = \\[ 80 443 ].*";
    };
    nginx-in-the-open = {
      given = nginx { server.listen = "0.0.0.0:8080"; };
      seen.wrong = wrong ".*0.0.0.0:8080 unencrypted: set services.nix-relay.settings.server.listen .*";
    };
    socket-for-a-name = {
      given = with' {
        socketActivation = true;
        settings = {
          auth.allowed_org = "org";
          server.listen = "host:8080";
        };
      };
      seen.wrong = wrong ".*\"host:8080\" .*server.listen .*socketActivation to false\\.";
    };
  };
  exports =
    variables:
    "export "
    + lib.escapeShellArgs (lib.mapAttrsToList (name: value: "${name}=${value}") variables)
    + "\n${builtins.readFile ../.github/actions/client/messages}\nexec /nix-relay/bin/nix-relay \"$@\"\n";
  warned = wrong;
  wrong = pattern: messages: builtins.length messages == 1 && match pattern (head messages) != null;

  # What may not even be evaluated.
  refused = {
    no-such-option = with' { allowedOrg = "org"; };
    listen-is-a-number = listen 8080;
    organisation-is-a-list = with' { settings.auth.allowed_org = [ "org" ]; };
    rule-without-a-name = with' { settings.auth.rule = [ { bound_claims.ref = "main"; } ]; };
    claim-is-a-fraction = with' {
      settings.auth.rule = [
        {
          name = "x";
          bound_claims.ref = 1.5;
        }
      ];
    };
    rule-for-nobody = with' {
      settings.auth.rule = [
        {
          name = "x";
          bound_claims.ref = "x";
          max_connections = 0;
        }
      ];
    };
    keys-somewhere = settings { auth.jwks_files."https://example.com" = "keys.json"; };
    grace-is-a-text = settings { server.shutdown_grace_secs = "30"; };
    timeout-is-a-text = settings { daemon.timeout_secs = "3600"; };
    queue-timeout-is-longer-than-clients-wait = settings { daemon.queue_timeout_secs = 31; };
    no-session = settings { daemon.max_connections = 0; };
    no-time-at-all = settings { server.handshake_timeout_secs = 0; };
    kept-for-no-time = with' {
      keepResults = 0;
      settings.auth.allowed_org = "org";
    };
    client-of-nothing = client { url = "https://relay.example.com"; };
    client-without-a-url.services.nix-relay-client = {
      enable = true;
      tokenFile = "/token";
    };
    # It would be copied into the store.
    client-with-its-token-beside = client { tokenFile = ./module.nix; };
    client-with-its-token-somewhere = client { tokenFile = "token"; };
    client-that-builds-nothing = client { maxJobs = 0; };
    queue-timeout-is-negative = settings { daemon.queue_timeout_secs = -1; };
    store-of-no-size = with' {
      stores.own = {
        rule = { inherit (rule) bound_claims; };
        size = "0";
      };
    };
    claim-is-a-set = with' {
      settings.auth.rule = [
        {
          name = "x";
          bound_claims.ref = { };
        }
      ];
    };
  };
  accepted = filter (
    name:
    (builtins.tryEval (
      let
        given = refused.${name};
        inherit (see given)
          buildMachines
          mounts
          nix
          toml
          ;
      in
      builtins.deepSeq (
        if given.services ? nix-relay then
          [
            mounts
            nix
            toml
          ]
        else
          buildMachines
      ) true
    )).success
  ) (attrNames refused);

  # nginx without a name is refused as soon as somebody looks at nginx.
  nameless = with' {
    nginx.enable = true;
    settings.auth.allowed_org = "org";
  };

  judge =
    name:
    { given, seen }:
    let
      all = see given;
      bad = filter (
        key: if builtins.isFunction seen.${key} then !seen.${key} all.${key} else seen.${key} != all.${key}
      ) (attrNames seen);
    in
    map (key: {
      name = "${name}.${key}";
      value = all.${key};
    }) bad;
  good = filter (
    name:
    let
      inherit (situations.${name}) given seen;
    in
    (seen.wrong or null) == [ ] && given ? services.nix-relay
  ) (attrNames situations);
in
{
  failures =
    listToAttrs (concatMap (name: judge name situations.${name}) (attrNames situations))
    // listToAttrs (
      map (name: {
        inherit name;
        value = "evaluates";
      }) accepted
    )
    // (
      if (builtins.tryEval (builtins.deepSeq (see nameless).nginx true)).success then
        { nameless = "evaluates"; }
      else
        { }
    );
  client = {
    inherit (see situations.client.given) builder line;
    inherit ((see situations.client.given).services.nix-daemon) path;
  };
  service = (see situations.least.given).services.nix-relay.serviceConfig;
  size = (see situations.stores.given).services.nix-relay-size-offline.script;
  written = listToAttrs (
    map (name: {
      inherit name;
      value = (see situations.${name}.given).toml;
    }) good
  );
}
