# In place of nixpkgs, where there is none: enough for every output of our flake to be evaluated, with packages that are
# but their names, and builders that keep what they are told.
{
  outputs =
    { self }:
    let
      # What builders are told may be anything that a derivation's attribute can be.
      make =
        system: attributes:
        let
          given = removeAttrs attributes [
            "meta"
            "passthru"
          ];
          derived = derivation (
            given
            // {
              inherit system;
              name = attributes.name or "${attributes.pname}-${attributes.version}";
              builder = "/bin/sh";
            }
          );
        in
        derived
        // attributes
        // attributes.passthru or { }
        // {
          overrideAttrs =
            change:
            make system (
              attributes
              // (
                if builtins.isFunction change then change (attributes // { nativeBuildInputs = [ ]; }) else change
              )
            );
        };
      on =
        system:
        let
          make' = make system;
          program =
            name:
            make' {
              inherit name;
              meta.mainProgram = name;
            };
          programs = builtins.listToAttrs (
            map
              (name: {
                inherit name;
                value = program name;
              })
              [
                "bubblewrap"
                "busybox"
                "caddy"
                "cargo"
                "clippy"
                "bash"
                "coreutils"
                "curl"
                "e2fsprogs"
                "haproxy"
                "iproute2"
                "jq"
                "nginx"
                "nix"
                "nixfmt-tree"
                "openssl"
                "pkg-config"
                "rustc"
                "rustfmt"
                "shellcheck"
                "shellcheck-minimal"
                "systemd"
                "tinyproxy"
                "util-linux"
                "versionCheckHook"
                "websocat"
              ]
          );
          pkgs = programs // {
            inherit (self) lib;
            inherit pkgs;
            pkgsStatic = pkgs;
            prometheus.cli = program "promtool";
            callPackage =
              file: arguments:
              let
                function = import file;
              in
              function (builtins.intersectAttrs (builtins.functionArgs function) pkgs // arguments);
            rustPlatform.buildRustPackage =
              function:
              let
                attributes = function package;
                package =
                  assert builtins.pathExists attributes.cargoLock.lockFile;
                  make' (removeAttrs attributes [ "cargoLock" ] // { inherit (attributes) meta; });
              in
              package;
            stdenv = {
              cc = program "cc";
              buildPlatform.canExecute = _: true;
              hostPlatform = {
                inherit system;
                isLinux = builtins.match ".*-linux" system != null;
              };
            };
            formats.toml = _: {
              type = self.lib.types.anything;
              generate =
                name: value:
                make' {
                  inherit name;
                  text = builtins.toJSON value;
                };
            };
            runCommand =
              name: attributes: script:
              make' (attributes // { inherit name script; });
            runCommandLocal = pkgs.runCommand;
            writeShellApplication =
              {
                name,
                text,
                runtimeInputs ? [ ],
                checkPhase ? "",
                meta ? { },
              }:
              make' {
                inherit
                  name
                  text
                  runtimeInputs
                  checkPhase
                  ;
                meta = {
                  mainProgram = name;
                }
                // meta;
              };
            glibc.static = program "glibc-static";
            mkShell =
              { packages, buildInputs }:
              make' {
                name = "shell";
                inherit packages buildInputs;
              };
            writeShellScript = pkgs.writeText;
            writeText = name: text: make' { inherit name text; };
            # Its machines are evaluated, too.
            testers.runNixOSTest =
              file:
              let
                test = import file {
                  inherit pkgs;
                  inherit (self) lib;
                };
              in
              make' {
                inherit (test) name testScript;
                nodes = map (node: (machine pkgs [ node ]).config.system.build.toplevel.drvPath) (
                  builtins.attrValues test.nodes
                );
              };
          };
        in
        pkgs;

      # What NixOS would make of these modules, if nothing is wrong with them; as text, since nobody builds it.
      machine =
        pkgs: modules:
        let
          nixos = import ./nixos.nix {
            inherit (self) lib;
            inherit (pkgs) nix;
          };
          inherit
            (self.lib.evalModules {
              modules = [ nixos ] ++ modules;
              specialArgs = { inherit pkgs; };
              freeform = self.lib.types.anything;
            })
            config
            ;
          wrong = builtins.filter (a: !a.assertion) config.assertions;
        in
        {
          config = config // {
            system.build.toplevel.drvPath =
              if wrong != [ ] then
                throw (builtins.head wrong).message
              else
                builtins.toJSON (config // { services = { inherit (config.services) nginx; }; });
          };
        };
    in
    {
      lib = import ./lib // {
        nixosSystem = { modules }: machine self.legacyPackages.x86_64-linux modules;
      };
      legacyPackages = builtins.listToAttrs (
        map
          (system: {
            name = system;
            value = on system;
          })
          [
            "x86_64-linux"
            "aarch64-linux"
            "x86_64-darwin"
            "aarch64-darwin"
          ]
      );
    };
}
